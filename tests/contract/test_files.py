"""Files of every method: nothing is lost on the way to disk and back, and a file that is not as it should be is refused by name."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.contract.hosts import HOSTS, Act, Cast, DiffusersHost, folder, host_of
from tests.contract.samples import (
    FACE_NETWORK,
    FAMILIES,
    METHOD_NAMES,
    SMALLEST,
    Case,
    acting,
    bare,
    features,
    fresh,
    read_file,
    same_tokens,
    trained,
    with_settings,
    write_adapter,
    write_file,
)

Tensors = dict[str, Tensor]
Metadata = dict[str, str]
Change = Callable[[Tensors, Metadata], tuple[Tensors, Metadata]]


def small_cast(method: str, kind: Any, comfyui: Path) -> Cast:
    """An adapter of few weights, to be changed one by one. It fits no UNet, so its family does not matter."""
    adapter = acting(fresh(Case(method, FAMILIES[0]), SMALLEST))
    file = write_adapter(adapter, folder() / f"small {method}.safetensors")
    return Cast(host_of(kind, FAMILIES[0], comfyui), file, SMALLEST)


@pytest.fixture(
    scope="module",
    params=itertools.product(METHOD_NAMES, HOSTS),
    ids=lambda param: f"{param[0]}-{param[1].__name__}",
)
def small(request: pytest.FixtureRequest, comfyui: Path) -> Cast:
    """A small adapter of each method in each host."""
    return small_cast(*request.param, comfyui)


@pytest.fixture(scope="module", params=METHOD_NAMES)
def core_small(request: pytest.FixtureRequest, comfyui: Path) -> Cast:
    """In one host, where many files are read: both read files by the same function."""
    return small_cast(request.param, DiffusersHost, comfyui)


# --- there and back --------------------------------------------------------------------------------------------------


def test_an_adapter_comes_back_as_it_was(host: Any, cast: Cast, case: Case, tmp_path: Path) -> None:
    """The digest, every tensor of the file, and what it draws."""
    in_memory = trained(case)
    assert host.digest(cast.adapter) == in_memory.digest
    tensors, metadata = read_file(cast.file)
    again = write_adapter(in_memory, tmp_path / "again.safetensors")
    assert read_file(again)[1] == metadata
    renamed = host.load(again)
    assert host.digest(renamed) == in_memory.digest
    assert host.draw(Act(renamed, cast.person()), steps=1).equals(cast.drawn())
    assert tensors.keys() == in_memory.state_dict().keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in in_memory.state_dict().items())


@pytest.mark.parametrize("photos", [1, 3])
def test_an_identity_comes_back_as_it_was(photos: int, host: Any, cast: Cast, tmp_path: Path) -> None:
    person = cast.person(1, photos)
    again = host.load_identity(host.save_identity(person, tmp_path / "person.safetensors"), cast.adapter)
    assert same_tokens(again, person)
    for name in ("method", "adapter", "recognizer", "class_word"):
        assert getattr(again, name) == getattr(person, name), name
    drawn = [host.draw(Act(cast.adapter, who), said=who, steps=1) for who in (person, again)]
    assert drawn[0].equals(drawn[1])


def test_every_weight_counts_in_the_digest(core_small: Cast, tmp_path: Path) -> None:
    host, (tensors, metadata) = core_small.host, read_file(core_small.file)
    digests = {host.digest(core_small.adapter)}
    for name, tensor in tensors.items():
        changed = tensor.clone()
        changed.view(-1)[-1] += 1
        file = write_file(tmp_path / "changed.safetensors", {**tensors, name: changed}, metadata)
        digests.add(host.digest(host.load(file)))
    assert len(digests) == 1 + len(tensors)


# --- adapters that are refused ---------------------------------------------------------------------------------------


def missing(tensors: Tensors, name: str) -> Tensors:
    return {key: tensor for key, tensor in tensors.items() if key != name}


def of_another_shape(tensors: Tensors, name: str) -> Tensors:
    return {**tensors, name: tensors[name].new_zeros((*tensors[name].shape, 2))}


def not_a_number(tensors: Tensors, name: str) -> Tensors:
    broken = tensors[name].clone()
    broken.view(-1)[0] = float("nan")
    return {**tensors, name: broken}


def under_another_name(tensors: Tensors, name: str) -> Tensors:
    return {**missing(tensors, name), f"{name}.more": tensors[name]}


def test_an_adapter_with_a_broken_weight_is_refused(core_small: Cast, tmp_path: Path) -> None:
    """Every weight in one way of these, in turns. The message names the file and the weight."""
    tensors, metadata = read_file(core_small.file)
    ways = itertools.cycle([missing, of_another_shape, not_a_number, under_another_name])
    for name, way in zip(tensors, ways, strict=False):
        file = write_file(tmp_path / "broken.safetensors", way(tensors, name), metadata)
        with pytest.raises(core_small.host.refusal, match=r"broken\.safetensors") as refused:
            core_small.host.load(file)
        assert name in str(refused.value), way.__name__


def without(metadata: Metadata, name: str) -> Metadata:
    return {key: value for key, value in metadata.items() if key != name}


def without_weights(tensors: Tensors) -> Tensors:
    return {"unrelated": torch.zeros(2)}


CHANGES: dict[str, tuple[Change, str]] = {
    "an unknown method": (lambda t, m: (t, {**m, "method": "nobody's"}), "nobody's"),
    "no method": (lambda t, m: (t, without(m, "method")), "method"),
    "a later format": (lambda t, m: (t, {**m, "format_version": "99"}), "99"),
    "another kind": (lambda t, m: (t, {**m, "kind": "identity"}), "identity"),
    "an unknown kind": (lambda t, m: (t, {**m, "kind": "portrait"}), "portrait"),
    "an unknown setting": (lambda t, m: (t, with_settings(m, colour="red")), "colour"),
    "a setting of another kind": (lambda t, m: (t, with_settings(m, recognizer=5)), "recognizer"),
    "no config": (lambda t, m: (t, without(m, "config")), "config"),
    "a config that is none": (lambda t, m: (t, {**m, "config": "{"}), "config"),
    "the weights of something else": (lambda t, m: (without_weights(t), m), "unrelated"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_adapter_that_is_something_else_is_refused(change: str, small: Cast, tmp_path: Path) -> None:
    alter, named = CHANGES[change]
    file = write_file(tmp_path / "altered.safetensors", *alter(*read_file(small.file)))
    with pytest.raises(small.host.refusal, match=r"altered\.safetensors") as refused:
        small.host.load(file)
    assert named in str(refused.value)


def test_a_size_that_the_weights_do_not_have_is_noticed(core_small: Cast, tmp_path: Path) -> None:
    """Refused where the weights show it. Else it is another adapter, or features do not fit, or the size means nothing."""
    host, (tensors, metadata) = core_small.host, read_file(core_small.file)
    settings = json.loads(metadata["config"])
    refused = 0
    for name in [name for name, size in settings.items() if type(size) is int and size]:
        altered = with_settings(metadata, **{name: 2 * settings[name]})
        try:
            adapter = host.load(write_file(tmp_path / "altered.safetensors", tensors, altered))
            if host.digest(adapter) != host.digest(core_small.adapter):
                continue
            person = host.encode(adapter, features(1, vision=SMALLEST.vision))
        except host.refusal:
            refused += 1
            continue
        assert same_tokens(person, core_small.person()), name
    assert refused


@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_an_adapter_that_is_cut_off_is_refused(length: int, small: Cast, tmp_path: Path) -> None:
    file = tmp_path / "cut.safetensors"
    file.write_bytes(small.file.read_bytes()[:length])
    with pytest.raises(small.host.refusal, match=r"cut\.safetensors"):
        small.host.load(file)


# --- identities that are refused -------------------------------------------------------------------------------------


def test_an_identity_of_another_adapter_is_refused(host: Any, cast: Cast, tmp_path: Path) -> None:
    """By its file's name and both digests, when it is loaded and when it is used."""
    tensors, metadata = read_file(cast.file)
    name = next(iter(tensors))
    other = host.load(
        write_file(tmp_path / "other.safetensors", {**tensors, name: tensors[name] + 1}, metadata)
    )
    file = host.save_identity(cast.person(), tmp_path / "person.safetensors")
    with pytest.raises(host.refusal, match=r"person\.safetensors .*other\.safetensors") as refused:
        host.load_identity(file, other)
    assert all(host.digest(adapter) in str(refused.value) for adapter in (cast.adapter, other))
    with pytest.raises(host.refusal, match=r"other\.safetensors"):
        host.draw(Act(other, cast.person()), steps=1)


IDENTITY_CHANGES: dict[str, tuple[Change, str]] = {
    "no adapter": (lambda t, m: (t, without(m, "adapter")), "adapter"),
    "no method": (lambda t, m: (t, without(m, "method")), "method"),
    "a later format": (lambda t, m: (t, {**m, "format_version": "99"}), "99"),
    "another kind": (lambda t, m: (t, {**m, "kind": "adapter"}), "adapter"),
    "a tensor too many": (lambda t, m: ({**t, "hat": torch.zeros(1, 1, 1)}, m), "hat"),
    "two people": (lambda t, m: ({key: torch.cat([tensor] * 2) for key, tensor in t.items()}, m), "tokens"),
    "tokens without a person": (lambda t, m: ({key: tensor[0] for key, tensor in t.items()}, m), "tokens"),
}


@pytest.mark.parametrize("change", IDENTITY_CHANGES)
def test_an_identity_that_is_something_else_is_refused(change: str, small: Cast, tmp_path: Path) -> None:
    alter, named = IDENTITY_CHANGES[change]
    whole = small.host.save_identity(small.person(), tmp_path / "whole.safetensors")
    file = write_file(tmp_path / "altered.safetensors", *alter(*read_file(whole)))
    with pytest.raises(small.host.refusal, match=r"altered\.safetensors") as refused:
        small.host.load_identity(file, small.adapter)
    assert named in str(refused.value)


# --- features that are refused ---------------------------------------------------------------------------------------


def test_faces_of_another_network_are_refused(small: Cast) -> None:
    with pytest.raises(small.host.refusal, match=rf"{FACE_NETWORK}, not feedfacefeedface") as refused:
        small.host.encode(small.adapter, features(1, vision=SMALLEST.vision, recognizer="feedfacefeedface"))
    assert small.file.name in str(refused.value)


def test_faces_that_lack_something_are_refused_or_lack_nothing(small: Cast) -> None:
    """A method that reads the embedding alone makes the same identity of it."""
    try:
        found = small.host.encode(small.adapter, bare(features(1, vision=SMALLEST.vision)))
    except small.host.refusal:
        return
    assert same_tokens(found, small.person())


def test_an_embedding_of_another_width_is_refused(small: Cast) -> None:
    given = features(1, vision=SMALLEST.vision)
    narrow = replace(given, embedding=given.embedding[:, :100])
    with pytest.raises(small.host.refusal, match="100"):
        small.host.encode(small.adapter, narrow)
