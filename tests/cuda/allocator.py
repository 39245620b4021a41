"""A model of PyTorch's CUDA allocator: how much memory it takes from the GPU for a sequence of tensors.

It follows c10/cuda/CUDACachingAllocator.cpp of PyTorch 2.14. A tensor gets the smallest free piece of memory that it
fits into; a piece that is freed joins its free neighbours; memory that was taken from the GPU is kept. What happens on
a full GPU is left out, such as giving memory back.
"""

from dataclasses import dataclass, field

MIB = 2**20
#: Tensors are rounded up to this many bytes.
ROUNDING = 512
#: Memory for tensors up to this size is apart from that for larger ones, and is taken from the GPU in these pieces.
SMALL, SMALL_SEGMENT = MIB, 2 * MIB
#: For larger tensors up to this size, pieces of the second size are taken; for others, as much as they need, rounded.
LARGE, LARGE_SEGMENT, LARGE_ROUNDING = 10 * MIB, 20 * MIB, 2 * MIB


@dataclass(eq=False)
class Pool:
    """The memory of one stream for small or for large tensors."""

    is_small: bool
    free: list["Piece"] = field(default_factory=list)
    #: The piece at the end, if the memory is one segment that grows.
    last: "Piece | None" = None


@dataclass(eq=False)
class Piece:
    """A piece of a segment, between its neighbours in the segment."""

    pool: Pool
    size: int
    before: "Piece | None" = None
    after: "Piece | None" = None
    is_free: bool = False


class Allocator:
    """The allocator of one GPU. `grows` is the setting `expandable_segments`.

    Attributes:
        reserved: the bytes taken from the GPU.
        in_use: the bytes of the tensors that exist, rounded up.
    """

    def __init__(self, *, grows: bool) -> None:
        self.grows = grows
        self.reserved = self.in_use = 0
        self._pools: dict[tuple[int, bool], Pool] = {}

    def take(self, num_bytes: int, stream: int = 0) -> Piece:
        """Return the memory for a tensor of this size on a stream."""
        size = -(-max(num_bytes, 1) // ROUNDING) * ROUNDING
        is_small = size <= SMALL
        pool = self._pools.setdefault((stream, is_small), Pool(is_small))
        piece = min((each for each in pool.free if each.size >= size), key=lambda each: each.size, default=None)
        if piece is not None:
            pool.free.remove(piece)
        else:
            piece = self._extend(pool, size) if self.grows else self._new_segment(pool, size)
        self._split(piece, size)
        piece.is_free = False
        self.in_use += piece.size
        return piece

    def give_back(self, piece: Piece) -> None:
        """Free the memory of a tensor."""
        self.in_use -= piece.size
        for other in (piece.before, piece.after):
            if other is not None and other.is_free:
                piece.pool.free.remove(other)
                self._join(piece, other)
        piece.is_free = True
        piece.pool.free.append(piece)

    def _new_segment(self, pool: Pool, size: int) -> Piece:
        if pool.is_small:
            taken = SMALL_SEGMENT
        elif size < LARGE:
            taken = LARGE_SEGMENT
        else:
            taken = -(-size // LARGE_ROUNDING) * LARGE_ROUNDING
        self.reserved += taken
        return Piece(pool, taken)

    def _extend(self, pool: Pool, size: int) -> Piece:
        """Return the end of the pool's segment, grown by as many whole pages as the tensor needs."""
        page = SMALL_SEGMENT if pool.is_small else LARGE_SEGMENT
        last = pool.last
        rest = last.size if last is not None and last.is_free else 0
        taken = -(-(size - rest) // page) * page
        self.reserved += taken
        piece = Piece(pool, taken, before=last)
        if last is not None:
            last.after = piece
            if last.is_free:
                pool.free.remove(last)
                self._join(piece, last)
        pool.last = piece
        return piece

    def _split(self, piece: Piece, size: int) -> None:
        """Leave what a tensor does not need of its piece as a free piece, unless that is too small to be one."""
        rest = piece.size - size
        # With segments that grow, any rest becomes a piece, because much memory may follow it.
        is_piece = rest >= ROUNDING if piece.pool.is_small or self.grows else rest > SMALL
        if not is_piece:
            return
        left = Piece(piece.pool, rest, before=piece, after=piece.after, is_free=True)
        if piece.after is not None:
            piece.after.before = left
        piece.size, piece.after = size, left
        if piece.pool.last is piece:
            piece.pool.last = left
        piece.pool.free.append(left)

    def _join(self, piece: Piece, other: Piece) -> None:
        """Make a neighbour part of a piece."""
        if other is piece.before:
            piece.before = other.before
            if piece.before is not None:
                piece.before.after = piece
        else:
            piece.after = other.after
            if piece.after is not None:
                piece.after.before = piece
        piece.size += other.size
        if piece.pool.last is other:
            piece.pool.last = piece
