"""What the ``capsule`` codec knows of one model's visual tokens: small networks and principal components."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from kvferry.codecs.grids import NEAREST, PLACE, Plan, cosines
from kvferry.codecs.profile import AnyProfile, half
from kvferry.codecs.side import What
from kvferry.errors import InputError
from kvferry.lazy import torch
from kvferry.rope import Rotary

Way = Literal["mlp", "pca", "interpolated", "full"]
"""How one side of a picture is carried: some tokens and a network, components, some tokens alone, or all tokens."""


@dataclass(frozen=True, eq=False)
class Network:
    """One small network per layer: what a left-out token's row differs by from the mean of its nearest kept ones.

    ``gelu(x @ first + bias) @ second + offset``, where ``x`` are the rows of the :data:`~kvferry.codecs.grids.NEAREST`
    nearest kept tokens and where they lie.

    Parameters
    ----------
    first : float32 ``[layers, NEAREST * width + PLACE, hidden]``
    bias : float32 ``[layers, hidden]``
    second : float32 ``[layers, hidden, width]``
    offset : float32 ``[layers, width]``
    """

    first: torch.Tensor
    bias: torch.Tensor
    second: torch.Tensor
    offset: torch.Tensor

    def rebuilt(self, kept: torch.Tensor, how: Plan, layers: slice) -> torch.Tensor:
        """Rows ``[l, absent, width]`` from those that are kept, ``[l, kept, width]``, all in deviations from means."""
        near, mean = neighbours(kept, how)
        place = how.place.to(kept.device).expand(len(kept), -1, -1)
        x = torch.cat([near.flatten(2), place], 2)
        inner = torch.nn.functional.gelu(torch.baddbmm(self.bias[layers, None], x, self.first[layers]))
        return mean + torch.baddbmm(self.offset[layers, None], inner, self.second[layers])


def neighbours(kept: torch.Tensor, how: Plan) -> tuple[torch.Tensor, torch.Tensor]:
    """Of every left-out token the nearest kept rows, ``[l, absent, NEAREST, width]``, and their mean by distance."""
    near = kept[:, how.near.to(kept.device)]
    return near, (how.shares.to(kept.device)[None, :, :, None] * near).sum(2)


@dataclass(frozen=True, eq=False)
class CapsuleProfile(AnyProfile):
    """See :class:`~kvferry.codecs.capsule.Capsule`.

    Parameters
    ----------
    means, deviations : dict of side to float32 ``[layers, width]``
        Of un-rotated keys and of values, ``width = kv_heads * head_dim``, over all visual tokens.
    networks : dict of side to Network
        Those that were learned.
    bases : dict of side to float32 ``[layers, rows, columns, r]``
        Principal components along the tokens of a picture, by falling energy: orthonormal over rows and columns, which
        are frequencies (:func:`~kvferry.codecs.grids.cosines`), so that pictures of every grid share them. On pictures
        of one grid these are the principal components of its tokens, since the cosines only turn them.
    fingerprint, rotary, shape, facts
        As in :class:`~kvferry.codecs.profile.Profile`.
    """

    kind: ClassVar[str] = "capsule"

    fingerprint: str
    means: dict[What, torch.Tensor]
    deviations: dict[What, torch.Tensor]
    networks: dict[What, Network]
    bases: dict[What, torch.Tensor]
    rotary: tuple[Rotary | None, ...]
    shape: tuple[int, int, int]
    facts: dict[str, Any]

    def __post_init__(self) -> None:
        layers, heads, dim = self.shape
        tensors = [*self.means.values(), *self.deviations.values()]
        inputs = {(n.first.shape[:2], n.second.shape[::2]) for n in self.networks.values()}
        width = heads * dim
        if (
            any(x.shape != (layers, width) for x in tensors)
            or inputs - {((layers, NEAREST * width + PLACE), (layers, width))}
            or any(x.ndim != 4 or len(x) != layers for x in self.bases.values())
            or len(self.rotary) != layers
        ):
            raise InputError("the parts of a capsule's profile do not fit each other; make it anew by kvferry fit")

    def check(self, side: What, way: Way) -> None:
        """Refuse a way that nothing was learned for."""
        has = self.networks if way == "mlp" else self.bases
        if way in ("mlp", "pca") and side not in has:
            raise InputError(
                f"this profile has no {way} of {side}; make one by `kvferry fit capsule MODEL --variants --out FILE`"
            )

    def check_grid(self, side: What, rows: int, columns: int, count: int) -> None:
        """Refuse a picture of more rows or columns than calibration saw, and more components than there are.

        Raises
        ------
        InputError
        """
        _, most_rows, most_columns, held = self.bases[side].shape
        if rows > most_rows or columns > most_columns:
            raise InputError(
                f"this capsule's profile was made from pictures of up to {most_rows} x {most_columns} tokens, and this "
                f"one has {rows} x {columns}; scale it down, or fit a capsule on such pictures "
                "(kvferry fit capsule MODEL --data FILE)"
            )
        if count > held:
            raise InputError(
                f"this capsule's profile holds {held} components, not {count} for {rows} x {columns} tokens; choose a "
                "smaller share, or fit a capsule with a larger --most"
            )

    def basis(self, side: What, layer: int, rows: int, columns: int, count: int) -> torch.Tensor:
        """The first ``count`` components of a picture's tokens, float32 ``[rows * columns, count]``."""
        waves = self.bases[side][layer, :rows, :columns, :count].double()
        found = torch.einsum("ru,uvk,cv->rck", cosines(rows), waves, cosines(columns))
        return found.flatten(0, 1).float()

    def tensors(self) -> dict[str, torch.Tensor]:
        """See :class:`~kvferry.codecs.profile.AnyProfile`."""
        found: dict[str, torch.Tensor] = {}
        for side in self.means:
            found[f"mean.{side}"], found[f"deviation.{side}"] = self.means[side], self.deviations[side]
        for side, network in self.networks.items():
            found |= {f"network.{side}.{f.name}": half(getattr(network, f.name)) for f in fields(Network)}
        return found | {f"basis.{side}": half(basis) for side, basis in self.bases.items()}


def capsule_profile(fingerprint: str, tensors: dict[str, torch.Tensor], common: dict[str, Any]) -> CapsuleProfile:
    """The profile in a file's ``tensors``."""
    sides: tuple[What, What] = ("keys", "values")
    networks = {}
    for side in sides:
        parts = {f.name: tensors.get(f"network.{side}.{f.name}") for f in fields(Network)}
        if all(x is not None for x in parts.values()):
            networks[side] = Network(**parts)  # type: ignore[arg-type]
    return CapsuleProfile(
        fingerprint,
        means={side: tensors[f"mean.{side}"] for side in sides},
        deviations={side: tensors[f"deviation.{side}"] for side in sides},
        networks=networks,
        bases={side: tensors[f"basis.{side}"] for side in sides if f"basis.{side}" in tensors},
        **common,
    )


def network_numbers(layers: int, width: int, hidden: int) -> int:
    """How many numbers the networks of one side hold."""
    return layers * ((NEAREST * width + PLACE + 1) * hidden + (hidden + 1) * width)


def costs(layers: int, heads: int, dim: int, tokens: int, hidden: int, most: float, share: float) -> dict[str, float]:
    """Of a profile and its use, by formula, for pictures of ``tokens`` tokens and keys by network, values by
    components.

    Returns
    -------
    dict
        ``bytes``: of the file, its numbers in 16 bits, one grid. ``rebuilding``: multiplications to rebuild one visual
        token's keys and values of all layers at this share, the mean over all tokens of a picture.
        ``components``: multiplications to find its components before sending, likewise.
    """
    width, count, held = heads * dim, round(share * tokens), round(most * tokens)
    network = layers * (NEAREST * width + (NEAREST * width + PLACE) * hidden + hidden * width)
    return {
        "bytes": 2 * (network_numbers(layers, width, hidden) + layers * tokens * held),
        "rebuilding": (1 - share) * network + layers * count * width,
        "components": layers * count * width,
    }
