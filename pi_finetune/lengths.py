"""Batches of unequal lengths: data with whole-number lengths, and the one mask made of them.

Lengths are counted in whole samples or frames and stay on the CPU, where slices, shapes and checks
need them; what a device needs of them is copied there, never read back. Float shares, as
SpeechBrain's modules take them, are made by :func:`shares` at the call of such a module alone.
"""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "Lasting",
    "Lengths",
    "Padded",
    "Waveforms",
    "as_lengths",
    "as_pair",
    "content_frames",
    "length_mask",
    "on_device",
    "shares",
    "zero_beyond",
]


#: Lengths [B] of a batch, as a caller gives them.
Lengths = Tensor | Sequence[int]


def as_lengths(lengths: Lengths) -> Tensor:
    """Lengths [B] as int64 on the CPU, from a tensor (on a GPU: a synchronisation) or a list.

    Raises
    ------
    ValueError
        They are not whole numbers, one for each item.
    """
    lengths = torch.as_tensor(lengths)
    if lengths.is_floating_point() or lengths.dtype == torch.bool or lengths.dim() != 1:
        raise ValueError(
            "lengths must be whole numbers, one for each item ([B], not relative lengths); got "
            f"{lengths.dtype} {list(lengths.shape)}"
        )
    return lengths.to("cpu", torch.int64)


def length_mask(
    lengths: Tensor, size: int, device: torch.device | None = None, start: Tensor | None = None
) -> Tensor:
    """Mask [B, size], True at ``start`` (default: 0) to ``start + lengths``, both [B].

    ``speechbrain.dataio.dataio.length_to_mask`` knows no start and cannot be traced for any batch
    size: it takes the ``len()`` of a tensor, which ``torch.export`` turns into a constant.

    Example
    -------
    >>> length_mask(torch.tensor([1, 3]), 4).int()
    tensor([[1, 0, 0, 0],
            [1, 1, 1, 0]], dtype=torch.int32)
    """
    device = lengths.device if device is None else device
    place = torch.arange(size, device=device)
    if start is None:
        return place < on_device(lengths, device)[:, None]
    ends = on_device(torch.stack([start, start + lengths]), device)[..., None]  # [2, B, 1]
    return (place >= ends[0]) & (place < ends[1])


def zero_beyond(x: Tensor, lengths: Tensor) -> Tensor:
    """``x`` [B, N, ...] with exact zeros beyond ``lengths`` [B], whatever was there (also NaN)."""
    outside = ~length_mask(lengths, x.shape[1], x.device)
    return x.masked_fill(outside.reshape(*outside.shape, *[1] * (x.dim() - 2)), 0)


def shares(lengths: Tensor, size: int, device: torch.device | None = None) -> Tensor:
    """Lengths [B] as shares of ``size`` in float32, as SpeechBrain's modules take them."""
    return on_device(lengths / size, lengths.device if device is None else device)


def on_device(lengths: Tensor, device: torch.device) -> Tensor:
    """Lengths [B] copied to ``device``; the CPU does not wait."""
    return lengths.to(device, non_blocking=True)


@dataclass(frozen=True, eq=False)
class Padded:
    """Rows of unequal lengths in one tensor.

    Arguments
    ---------
    data : Tensor
        [B, N, ...]; what lies beyond a length means nothing.
    lengths : Tensor
        [B], int64 on the CPU, at most N.
    """

    data: Tensor
    lengths: Tensor

    @classmethod
    def collate(cls, rows: Sequence[Tensor], **fields: Any) -> Self:
        """From rows [N, ...] of unequal N; zeros follow the shorter ones."""
        data = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
        return cls(data, torch.tensor([len(row) for row in rows]), **fields)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def device_lengths(self) -> Tensor:
        """Lengths [B] on the device of the data, for arithmetic with it."""
        return on_device(self.lengths, self.data.device)

    def mask(self) -> Tensor:
        """[B, N], True at valid places, on the device of the data."""
        return length_mask(self.lengths, self.data.shape[1], self.data.device)

    def items(self) -> list[Tensor]:
        """The rows without their padding, as views."""
        return [row[:n] for row, n in zip(self.data, self.lengths.tolist())]

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """As ``Tensor.to``, for the data; lengths stay on the CPU."""
        return replace(self, data=self.data.to(*args, **kwargs))

    def pin_memory(self) -> Self:
        """As ``Tensor.pin_memory``, for the data."""
        return replace(self, data=self.data.pin_memory())

    def with_data(self, data: Tensor) -> Self:
        """Other data of the same lengths."""
        return replace(self, data=data)


class Lasting(NamedTuple):
    """The name of a row whose samples it tells, so that it holds in every pass and process.

    ``key`` is the utterance's, ``digest`` that of its samples.
    """

    key: str
    digest: int


@dataclass(frozen=True, eq=False)
class Waveforms(Padded):
    """A batch of waveforms, and where in them the speech to be compared lies.

    Arguments
    ---------
    data : Tensor
        [B, T], float, 16 kHz.
    lengths : Tensor
        [B] in samples, all that is heard; int64 on the CPU.
    content : tuple of Tensor, optional
        First sample and number of samples of the content, [B] each, int64 on the CPU. What lies
        around it is heard but not compared. Default: all.
    padding_counts : bool
        Whether what lies around the content counts in a teacher's statistics (the mean and
        variance of the waveform, group norms over time). Default: False.
    ids : tuple of hashables, optional
        What each row is, [B]: rows of equal names are equal. Caches go by them; without them
        nothing is kept. A name that is :class:`Lasting`, or made of one by :meth:`renamed`, holds
        beyond this pass over the data.

    Example
    -------
    >>> wavs = Waveforms.collate([torch.ones(3), torch.ones(2)])
    >>> moved = wavs.surrounded(torch.tensor([1, 0]), torch.tensor([0, 1]))
    >>> moved.data.int().tolist(), moved.lengths.tolist(), moved.content_start.tolist()
    ([[0, 1, 1, 1], [1, 1, 0, 0]], [4, 3], [1, 0])
    """

    content: tuple[Tensor, Tensor] | None = None
    padding_counts: bool = False
    ids: tuple[Hashable, ...] | None = None

    @classmethod
    def of(cls, wavs: "Tensor | Waveforms", lengths: Lengths | None = None) -> "Waveforms":
        """What a caller gave: ``Waveforms``, or a tensor [B, T] and lengths [B] (default: T).

        Raises
        ------
        ValueError
            Not float [B, T], or lengths that do not fit.
        """
        if isinstance(wavs, Waveforms):
            if lengths is not None:
                raise ValueError("lengths: Waveforms have lengths of their own, leave it out")
            return wavs
        if wavs.dim() != 2 or not wavs.is_floating_point():
            raise ValueError(f"wavs must be float [B, T], got {wavs.dtype} {list(wavs.shape)}")
        batch, time = wavs.shape
        if lengths is None:
            return cls(wavs, torch.full((batch,), time))
        lengths = as_lengths(lengths)
        if len(lengths) != batch:
            raise ValueError(f"lengths must be {batch}, one for each item; got {len(lengths)}")
        if batch and int(lengths.max()) > time:
            raise ValueError(f"a length of {int(lengths.max())} exceeds the {time} samples of wavs")
        return cls(wavs, lengths)

    @property
    def content_start(self) -> Tensor:
        """First sample of the content, [B]."""
        return torch.zeros_like(self.lengths) if self.content is None else self.content[0]

    @property
    def content_lengths(self) -> Tensor:
        """Samples of the content, [B]."""
        return self.lengths if self.content is None else self.content[1]

    def named(self, ids: Sequence[Hashable] | None) -> "Waveforms":
        """With names of the rows, [B]."""
        return replace(self, ids=None if ids is None else tuple(ids))

    def taken(self, rows: Tensor) -> "Waveforms":
        """The rows of these numbers (int64 on the CPU), in their order."""
        content = self.content
        return replace(
            self,
            data=self.data[rows.to(self.data.device, non_blocking=True)],
            lengths=self.lengths[rows],
            content=None if content is None else (content[0][rows], content[1][rows]),
            ids=None if self.ids is None else tuple(self.ids[i] for i in rows.tolist()),
        )

    def cut(self, lengths: Tensor) -> "Waveforms":
        """The first ``lengths`` [B] samples of each row, all of them content."""
        return Waveforms(
            self.data[:, : int(lengths.max())], lengths, ids=self.renamed("cut", lengths.tolist())
        )

    def contents(self) -> "Waveforms":
        """The content by itself."""
        if self.content is None:
            return self
        starts, sizes = (each.tolist() for each in self.content)
        return Waveforms.collate([x[s : s + n] for x, s, n in zip(self.data, starts, sizes)])

    def surrounded(
        self, before: Tensor, after: Tensor, padding_counts: bool | None = None
    ) -> "Waveforms":
        """With ``before`` and ``after`` [B] samples of zeros around each row, which are no content.

        ``padding_counts`` is kept unless given.
        """
        lengths = before + self.lengths + after
        size, starts = int(lengths.max()), before.tolist()
        rows = [
            F.pad(row, (start, size - start - len(row))) for row, start in zip(self.items(), starts)
        ]
        return Waveforms(
            torch.stack(rows),
            lengths,
            content=(self.content_start + before, self.content_lengths),
            padding_counts=self.padding_counts if padding_counts is None else padding_counts,
            ids=self.renamed("zeros", zip(starts, after.tolist())),
        )

    def with_data(self, data: Tensor) -> "Waveforms":
        """Other data of the same lengths and content, which has no names."""
        return replace(self, data=data, ids=None)

    def renamed(self, what: str, how: Iterable[Hashable]) -> tuple[Hashable, ...] | None:
        """Names of rows to which ``what`` was done, with the values ``how`` (one for each)."""
        if self.ids is None:
            return None
        return tuple((name, what, value) for name, value in zip(self.ids, how, strict=True))


def content_frames(reps: Tensor, wavs: Waveforms, hop: int, counts: Tensor) -> Tensor:
    """What a teacher made of the content, from what it made of everything.

    Arguments
    ---------
    reps : Tensor
        [B, F, ...], all frames of ``wavs``; frame k begins at sample k * ``hop``.
    wavs : Waveforms
        Their content begins after whole hops.
    hop : int
        In samples.
    counts : Tensor
        [B], frames of the content.

    Returns
    -------
    Tensor
        [B, N, ...], zero beyond ``counts``; N is the largest of them.
    """
    if wavs.content is None:
        return zero_beyond(reps[:, : int(counts.max())], counts)
    first = (wavs.content_start // hop).tolist()
    rows = [row[start : start + n] for row, start, n in zip(reps, first, counts.tolist())]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def as_pair(
    enhanced: Tensor | Waveforms, clean: Tensor | Waveforms, lengths: Lengths | None = None
) -> tuple[Waveforms, Waveforms]:
    """Enhanced and clean speech of common lengths [B], as an objective is given them."""
    if not isinstance(enhanced, Waveforms):
        given = clean.lengths if lengths is None and isinstance(clean, Waveforms) else lengths
        enhanced = Waveforms.of(enhanced, given)
    elif lengths is not None:
        raise ValueError("lengths: Waveforms have lengths of their own, leave it out")
    if not isinstance(clean, Waveforms):
        clean = Waveforms.of(clean, enhanced.lengths)
    return enhanced, clean
