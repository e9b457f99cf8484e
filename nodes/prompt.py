"""The ID Prompt node: a prompt with an identity in it."""

from __future__ import annotations

import re
from typing import Any

from comfy_api.latest import io

from ..idadapter_core import Identity
from ..idadapter_core.errors import InputError
from ..idadapter_core.mechanisms.text import IDENTIFIER
from ..idadapter_core.placeholders import CLASS_WORD
from .host.choices import AUTO
from .host.messages import info, keeps_report, node_id_of, report_ui, warning
from .host.off import is_off
from .host.text import complete_prompt, encode_prompt
from .host.titles import PROMPT
from .sockets import CATEGORY, IdentitySocket

NO_TEXT_BRANCH = (
    "the adapter of this identity has no text branch, so the prompt is encoded without identity tokens; the person comes from "
    "Apply ID Adapter alone"
)
CLASS_WORDS = (AUTO, "person", "woman", "man", "girl", "boy")


class IDPrompt(io.ComfyNode):
    @classmethod
    @keeps_report
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="IDAdapterPrompt",
            display_name=PROMPT,
            category=CATEGORY,
            description=(
                "A positive prompt with the identity in it. Write <class word> where the person's noun belongs: "
                '"portrait photo of a <class word> reading in a cafe". An IDAdapter identity is the word sks: where the text has '
                'none, ", <class word> is sks" is added. The negative prompt stays an ordinary CLIP Text Encode.'
            ),
            search_aliases=["uniid prompt", "identity prompt", "text encode identity"],
            inputs=[
                io.Clip.Input("clip", tooltip="The CLIP of the model's checkpoint."),
                IdentitySocket.Input("identity", tooltip="From Mix Face Features or Load Identity."),
                io.String.Input(
                    "text",
                    default=f"photo of a {CLASS_WORD}",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip=f"What the person does, wears, where they are. {CLASS_WORD} becomes the class word. Prompt weights and "
                    "embeddings work as in CLIP Text Encode; any length.",
                ),
                io.Combo.Input(
                    "class_word",
                    options=list(CLASS_WORDS),
                    default=AUTO,
                    tooltip=f"What stands for {CLASS_WORD}. auto: man or woman as the face package sees the photos, person where it cannot tell.",
                ),
                io.Float.Input(
                    "token_weight",
                    default=1.0,
                    min=0.0,
                    max=3.0,
                    step=0.05,
                    tooltip="How much the identity counts in the prompt. UniID: length of its tokens, as a multiple of a well-known "
                    "name's; Normalized Identity Rescaling multiplies it by its text scales. IDAdapter: prompt weight of the word.",
                ),
            ],
            hidden=[io.Hidden.dynprompt, io.Hidden.unique_id],
            outputs=[
                io.Conditioning.Output(
                    "conditioning", display_name="conditioning", tooltip="For the sampler's positive input."
                ),
                io.String.Output("prompt", display_name="prompt", tooltip="The text as it was encoded."),
            ],
        )

    @classmethod
    def execute(
        cls, clip: Any, identity: Identity | None, text: str, class_word: str, token_weight: float
    ) -> io.NodeOutput:
        if clip is None:
            raise InputError(
                "ID Prompt got no CLIP: this checkpoint holds no text encoder. Load one with a CLIP loader and wire it to `clip`."
            )
        seen = "" if identity is None else identity.class_word
        word = class_word_of(class_word, seen)
        filled = fill_class_word(text, word)
        if identity is None or is_off(cls.hidden):
            plain = clip.encode_from_tokens_scheduled(clip.tokenize(filled))
            return io.NodeOutput(
                plain, filled, ui=report_ui([info(f'Encoded without the person: "{filled}"')])
            )
        prompt = complete_prompt(clip, filled, identity, word)
        conditioning = encode_prompt(clip, prompt, identity, token_weight, node_id_of(cls))
        messages = [info(f'Encoded: "{prompt}"')]
        if prompt != text:
            messages.insert(0, info(class_word_line(word, class_word, seen)))
        if prompt != filled:
            messages.insert(
                1, info(f'The text had no "{IDENTIFIER}", the word of the identity, so it was added.')
            )
        if not identity.text_tokens:
            messages.append(warning(NO_TEXT_BRANCH))
        return io.NodeOutput(conditioning, prompt, ui=report_ui(messages, PROMPT))


def fill_class_word(text: str, word: str) -> str:
    """Put the noun of a person where a prompt has its place."""
    return re.sub(re.escape(CLASS_WORD), lambda _: word, text, flags=re.IGNORECASE)


def class_word_of(choice: str, seen: str) -> str:
    """Return the noun of a person: as chosen, or for `auto` what the photos tell (`seen`; empty: nothing)."""
    return (seen or "person") if choice == AUTO else choice


def class_word_line(word: str, choice: str, seen: str) -> str:
    """Name the class word and the source of the choice. `seen`: what the photos tell; empty: nothing."""
    if choice != AUTO:
        return f'Class word: "{word}", as chosen.'
    source = "as the face package sees the photos" if seen else "because the photos do not tell more"
    return f'Class word: "{word}", {source}.'
