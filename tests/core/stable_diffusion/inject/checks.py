"""What holds for both methods in a diffusers UNet. Each check is given what its method injects."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from idadapter_core.adapter import Adapter
from idadapter_core.errors import InputError, MismatchError
from idadapter_core.stable_diffusion.inject import Injected, inject
from tests.golden import recipe
from tests.tiny.diffusers_unet import inputs, observed, predict, traces


def bad_tokens(tokens: Tensor) -> list[tuple[dict[str, Any], type[Exception], str]]:
    """Identities that nobody can have: settings, the error, and what it says."""
    return [
        ({"tokens": torch.zeros(1, 5, 7)}, MismatchError, "7 wide, the adapter reads tokens of width 64"),
        ({"tokens": tokens[0]}, InputError, r"tokens must be .*\(1 or batch, tokens, width\)"),
        ({"tokens": tokens.long()}, InputError, "tokens must be floating point"),
        ({"tokens": tokens[:, :0]}, InputError, "tokens must be"),
    ]


def require_refused(
    injected: Injected, tokens: Tensor, given: Mapping[str, Any], error: type[Exception], message: str
) -> None:
    """An identity is refused, and the one that was set before stays."""
    injected.set_identity(tokens)
    want = predict(injected.unet)
    with pytest.raises(error, match=message):
        injected.set_identity(**{"tokens": tokens, **given})
    assert torch.equal(predict(injected.unet), want), "what was set before is gone"


def require_three_rows(injected: Injected, given: Mapping[str, Any]) -> None:
    """An identity of three rows is refused in a call of two."""
    injected.set_identity(**given)
    assert predict(injected.unet, rows=3).isfinite().all()
    with pytest.raises(InputError, match="set for 3 rows, but the UNet is called with 2"):
        predict(injected.unet, rows=2)


def require_one_device(unet: Any, adapter: Adapter, tokens: Tensor) -> None:
    injected = inject(unet, adapter)
    adapter.layers.to("meta")
    injected.set_identity(tokens)
    with pytest.raises(MismatchError, match=r"computes on cpu.* on meta. Move the layers"):
        predict(unet)


def require_no_waiting(unet: Any, adapter: Adapter, *identity: Any, **settings: Any) -> None:
    """An observer is told what is still to be computed: on the meta device nothing can be read."""
    injected = inject(unet.to("meta"), adapter)
    adapter.layers.to("meta")
    injected.set_identity(*identity, **settings)
    told = observed(injected)
    unet(**{name: tensor.to("meta") for name, tensor in inputs("sd15").items()})
    assert len(told) == len(injected.sites)
    assert all(norm.device.type == "meta" for _, *norms in told for norm in norms)


class AsItWas:
    """A UNet as it is now, to compare with later."""

    def __init__(self, unet: Any, kind: str) -> None:
        self._unet, self._kind = unet, kind
        self._written, self.traces, self.base = repr(unet), traces(unet), predict(unet, kind)
        self.state = {key: tensor.clone() for key, tensor in unet.state_dict().items()}

    def require(self) -> None:
        assert repr(self._unet) == self._written
        assert traces(self._unet) == self.traces
        assert self._unet.state_dict().keys() == self.state.keys()
        assert all(torch.equal(tensor, self.state[key]) for key, tensor in self._unet.state_dict().items())
        assert torch.equal(predict(self._unet, self._kind), self.base)


def require_gradients(
    unet: Any, loss: Callable[[], Tensor], leaves: Mapping[str, Tensor], dropped: int
) -> None:
    """One backward pass reaches every leaf, none of the UNet, and not the tokens of the dropped row."""
    loss().backward()
    assert all(parameter.grad is None for parameter in unet.parameters())
    for name, tensor in leaves.items():
        assert tensor.grad is not None, name
        assert tensor.grad.any(), name
    gradient = leaves["tokens"].grad
    assert gradient is not None
    assert not gradient[dropped].any(), "a dropped row trains its tokens"


def require_derivatives(
    loss: Callable[[], Tensor],
    leaves: Mapping[str, Tensor],
    groups: Sequence[Callable[[str], bool]],
    *,
    step: float,
    tolerance: float,
) -> None:
    """The gradients are what the loss changes by along a random direction of each group of leaves."""
    directions = {name: recipe.value(1, name, t.shape or (1,)).view_as(t) for name, t in leaves.items()}

    @torch.no_grad()
    def along(names: Sequence[str], distance: float) -> float:
        with _moved(leaves, {name: distance * directions[name] for name in names}):
            return float(loss())

    for group in groups:
        names = [name for name in leaves if group(name)]
        assert names
        measured = (along(names, step) - along(names, -step)) / (2 * step)
        wanted = sum(float((leaves[name].grad * directions[name]).sum()) for name in names)
        assert measured == pytest.approx(wanted, rel=tolerance, abs=tolerance), names[0]


@contextmanager
def _moved(leaves: Mapping[str, Tensor], by: Mapping[str, Tensor]) -> Iterator[None]:
    for name, change in by.items():
        leaves[name].add_(change)
    yield
    for name, change in by.items():
        leaves[name].sub_(change)


def require_same_gradients(found: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> None:
    assert found.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(found[name], want[name], msg=name)
