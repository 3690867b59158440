"""Bridges: what stands between an encoder's annotations and the decoder that attends over them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from captioner.attention import Annotations
from captioner.errors import InputError


class Bridge(nn.Module):
    """Annotations in, annotations out: (B, N, D) to (B, N, `annotation_dim`), with the same regions.

    Attributes
    ----------
    annotation_dim : int
        Size of the annotation vectors that it gives.
    """

    annotation_dim: int

    def forward(self, annotations: Annotations) -> Annotations:
        """Return the annotations that the decoder attends over."""
        raise NotImplementedError


class NoBridge(Bridge):
    """Hands the encoder's annotations on as they are."""

    def __init__(self, annotation_dim: int) -> None:
        super().__init__()
        self.annotation_dim = annotation_dim

    def forward(self, annotations: Annotations) -> Annotations:  # noqa: D102
        return annotations


class LinearBridge(Bridge):
    """A linear projection of each region, normalised before and rectified after.

    Parameters
    ----------
    annotation_dim : int
        D, size of the encoder's annotation vectors.
    dim : int
        Size of the vectors that it gives.
    dropout : float
        Share of values dropped before and after the projection. On few captions this matters most.
    positions : bool
        Add a learned vector for the row and one for the column of each region.
    """

    def __init__(self, annotation_dim: int, *, dim: int = 512, dropout: float = 0.0, positions: bool = False) -> None:
        super().__init__()
        self.annotation_dim, self.dim, self.dropout = dim, dim, dropout
        self.norm = nn.LayerNorm(annotation_dim)
        self.projection = nn.Linear(annotation_dim, dim)
        self.drop = nn.Dropout(dropout)
        self.positions = positions
        self.position = RegionPositions(dim) if positions else None

    def forward(self, annotations: Annotations) -> Annotations:  # noqa: D102
        values = torch.relu(self.projection(self.drop(self.norm(annotations.values))))
        if self.position is not None:
            values = values + self.position(annotations.grid)
        return annotations._replace(values=self.drop(values))


class RegionPositions(nn.Module):
    """Learned two-dimensional positions: one vector per row and one per column of the grid, added.

    Parameters
    ----------
    dim : int
        Size of the vectors.
    largest : int
        Most rows, and most columns, that a grid may have.
    """

    def __init__(self, dim: int, largest: int = 32) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.randn(largest, dim) * 0.1)
        self.columns = nn.Parameter(torch.randn(largest, dim) * 0.1)

    def forward(self, grid: tuple[int, int] | None) -> Tensor:
        """Return the (h * w, dim) positions of a grid's regions, row by row.

        Raises
        ------
        InputError
            Where the regions are no grid, or a larger one than there are vectors for.
        """
        largest = len(self.rows)
        if grid is None or max(grid) > largest:
            regions = "these regions are not a grid" if grid is None else f"this grid has {grid[0]} x {grid[1]} regions"
            raise InputError(
                f"The bridge's positions need a grid of at most {largest} x {largest} regions, but {regions}: "
                "set positions to false, or the encoder's grid to a smaller number."
            )
        height, width = grid
        return (self.rows[:height, None] + self.columns[None, :width]).flatten(0, 1)
