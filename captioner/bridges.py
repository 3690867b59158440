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
    regionwise : bool
        Whether what it gives for a region depends on that region alone, and on its place.
    """

    annotation_dim: int
    regionwise = False

    def forward(self, annotations: Annotations) -> Annotations:
        """Return the annotations that the decoder attends over."""
        raise NotImplementedError


class NoBridge(Bridge):
    """Hands the encoder's annotations on as they are."""

    regionwise = True

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

    regionwise = True

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


class TransformerBridge(Bridge):
    """A linear bridge, and behind it regions that read each other: the encoder of Vaswani et al. (2017), section 3.1.

    With :class:`~captioner.decoders.TransformerDecoder` behind it, it makes the whole Transformer of the paper, whose
    source is an image: what stands for words there is :class:`LinearBridge` here. The layers are torch's, which drop
    attention weights and values inside the feed-forward network, too. What a region's vector says is then no longer of
    that region alone, so a map of attention over them is a looser statement about places.

    Parameters
    ----------
    annotation_dim : int
        D, size of the encoder's annotation vectors.
    dim : int
        Size of the vectors that it gives.
    dropout : float
        Share of values dropped before and after the projection; see :class:`LinearBridge`.
    positions : bool
        Add a learned vector for the row and one for the column of each region. Without them, or where the regions are
        no grid, self-attention does not know where a region is.
    layers : int
        Number of layers.
    heads : int
        Heads of each self-attention; must divide `dim`.
    feed_forward_dim : int, optional
        Size between the two products of the feed-forward network; 4 `dim` by default, as in the paper.
    norm_first : bool
        Normalise what enters a sublayer (pre-norm); False: the sum behind it, as in the paper.
    layer_dropout : float
        Share of values dropped inside the layers.

    Raises
    ------
    InputError
        Where a setting is out of its range; from the regions of no grid, if positions are asked for.
    """

    def __init__(
        self,
        annotation_dim: int,
        *,
        dim: int = 512,
        dropout: float = 0.0,
        positions: bool = True,
        layers: int = 2,
        heads: int = 8,
        feed_forward_dim: int | None = None,
        norm_first: bool = True,
        layer_dropout: float = 0.1,
    ) -> None:
        super().__init__()
        feed_forward_dim = 4 * dim if feed_forward_dim is None else feed_forward_dim
        if min(dim, layers, feed_forward_dim) < 1 or not (0 <= dropout < 1 and 0 <= layer_dropout < 1):
            raise InputError(
                f"There is no TransformerBridge of dim {dim}, {layers} layers, feed_forward_dim {feed_forward_dim}, "
                f"dropout {dropout} and layer_dropout {layer_dropout}: give at least 1 of the first three, and from 0 "
                "to below 1 of the others."
            )
        if heads < 1 or dim % heads:
            raise InputError(
                f"The TransformerBridge cannot split dim {dim} into {heads} heads: choose a divisor of {dim}."
            )
        self.annotation_dim, self.dim, self.dropout, self.positions = dim, dim, dropout, positions
        self.layers, self.heads, self.feed_forward_dim = layers, heads, feed_forward_dim
        self.norm_first, self.layer_dropout = norm_first, layer_dropout
        self.projection = LinearBridge(annotation_dim, dim=dim, dropout=dropout, positions=positions)
        # Not nn.TransformerEncoder, whose layers would all begin with the same weights.
        self.stack = nn.ModuleList(
            nn.TransformerEncoderLayer(
                dim, heads, feed_forward_dim, layer_dropout, norm_first=norm_first, batch_first=True
            )
            for _ in range(layers)
        )
        # The sums of pre-norm layers grow with depth, so the last one is normalised, too.
        self.norm = nn.LayerNorm(dim) if norm_first else nn.Identity()

    def forward(self, annotations: Annotations) -> Annotations:  # noqa: D102
        bridged: Annotations = self.projection(annotations)
        missing = None if bridged.mask is None else ~bridged.mask
        values = bridged.values
        for layer in self.stack:
            values = layer(values, src_key_padding_mask=missing)
        return bridged._replace(values=self.norm(values))


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
