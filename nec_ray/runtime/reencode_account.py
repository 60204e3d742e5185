"""What a re-encoding did, or would do: tiles, bytes, loss and cost."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from nec_ray.runtime.plan import SHARD_TILES
from nec_ray.runtime.policy import Policy
from nec_ray.runtime.reencode_plan import Move, Selection
from nec_ray.runtime.transcode import CHUNK_TILES

_READ_BYTES = 4 << 20
_CELL_WRITES = 4
"""Index files, commit and lease."""


@dataclass
class MoveAccount:
    """What was done, or would be, about the tiles that a rule moves from one codec to another."""

    rule: str
    sources: list[str]
    """Ids of the codecs that they are under."""
    target: str
    tiles: int
    bytes_before: int
    bytes_after: int
    exact: bool
    """False where `bytes_after` is estimated."""
    swapped: int = 0
    left: int = 0
    """Tiles that other writers changed meanwhile, or that a refused cell holds: a later run looks at them."""
    failed: int = 0
    """Tiles that stay as they are: a damaged payload, or pixels that cannot be encoded."""
    reasons: dict[str, str] = field(default_factory=dict)
    """Why, by tile id, of the first of them."""
    not_in_catalog: int = 0
    """Tiles that stay as they are since the catalog of pixels lacks them."""
    cells: int = 0
    distortion: float | None = None
    """Share of the old embeddings' variance that is lost, see `transcode.Loss`; null from pixels, which have none."""
    largest_distortion: float | None = None
    """Of a cell; in a dry run of the sample."""
    max_distortion: float | None = None
    """What the rule allows a cell."""


@dataclass
class Reencoding:
    """Account of a run, or of a dry run."""

    archive: str
    at: str
    """What `now()` was in the rules' conditions."""
    dry_run: bool
    version: int
    """The newest after the run."""
    tiles: int
    """Of the archive."""
    todo: int
    """Tiles that were not what the policy says."""
    swapped: int
    moves: list[MoveAccount]
    bytes_before: int
    """Payload bytes of the archive; the old ones lie there until `gc` takes them."""
    bytes_after: int
    exact: bool
    """False where `bytes_after` is estimated."""
    storage_month_before: float
    storage_month_after: float
    """Price of these bytes for a month."""
    run_cost: float
    """About what the requests of the run cost."""
    currency: str
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """As plain types, for `--json`; what JSON has no number for is null."""
        plain = asdict(self)
        for move in plain["moves"]:
            for name in ("distortion", "largest_distortion"):
                if move[name] is not None and not math.isfinite(move[name]):
                    move[name] = None
        return plain

    def lines(self) -> list[str]:
        """The account as a person reads it."""
        about = "" if self.exact else "about "
        lines = [f"archive: {self.archive}, version {self.version}, {self.tiles:,} tiles; rules as of {self.at}"]
        for move in self.moves:
            sources = ", ".join(source[:12] for source in move.sources)
            lines.append(
                f"{move.rule}: {move.tiles:,} tiles from codec {sources} to {move.target[:12]}, {move.bytes_before:,} "
                f"bytes to {'' if move.exact else 'about '}{move.bytes_after:,}" + _said_of_loss(move, self.dry_run)
            )
            if not self.dry_run:
                parts = {
                    "swapped": move.swapped,
                    "left for the next run": move.left,
                    "kept, since they cannot be re-encoded": move.failed,
                    "kept, since the catalog lacks them": move.not_in_catalog,
                }
                lines.append("  " + ", ".join(f"{n:,} {what}" for what, n in parts.items() if n or what == "swapped"))
            lines += [f"  tile {tile_id}: {reason}" for tile_id, reason in move.reasons.items()]
        if not self.moves:
            lines.append("nothing to do: every tile is what it should be")
        lines.append(
            f"payloads: {self.bytes_before:,} bytes before, {about}{self.bytes_after:,} after; "
            f"{self.storage_month_before:,.4g} {self.currency} a month before, {self.storage_month_after:,.4g} after; "
            f"requests of the run: about {self.run_cost:,.2g} {self.currency}"
        )
        if self.dry_run:
            lines.append("nothing was written")
        elif self.swapped:
            lines.append(
                f"this run: {self.swapped:,} tiles in {self.seconds:.0f} s; gc removes the old payloads in time"
            )
        return lines


def new_account(policy: Policy, selection: Selection) -> Reencoding:
    """Account of a run that has not done anything yet."""
    return Reencoding(
        archive=selection.archive.url,
        at=selection.at.isoformat(timespec="seconds"),
        dry_run=False,
        version=selection.archive.version,
        tiles=len(selection.archive),
        todo=selection.todo,
        swapped=0,
        moves=[],
        bytes_before=selection.n_bytes,
        bytes_after=selection.n_bytes,
        exact=True,
        storage_month_before=0.0,
        storage_month_after=0.0,
        run_cost=0.0,
        currency=policy.cost.currency,
    )


def move_account(move: Move, after: int, exact: bool) -> MoveAccount:
    """Account of a move that has not done anything yet, with the bytes that its tiles take after it."""
    return MoveAccount(
        rule=move.rule.name,
        sources=list(move.sources),
        target=move.target.id if move.target else "",
        tiles=move.tiles,
        bytes_before=move.n_bytes,
        bytes_after=after,
        exact=exact,
        max_distortion=move.rule.max_distortion,
    )


def add_up(account: Reencoding, policy: Policy, selection: Selection) -> None:
    """Fill in the totals and prices."""
    account.bytes_after = account.bytes_before + sum(move.bytes_after - move.bytes_before for move in account.moves)
    account.exact = all(move.exact for move in account.moves)
    cost = policy.cost
    account.storage_month_before = account.bytes_before / 1e9 * cost.storage_gb_month
    account.storage_month_after = account.bytes_after / 1e9 * cost.storage_gb_month
    reads = writes = 0
    for move, mine in zip(selection.moves, account.moves, strict=False):
        tiles_a_pack = SHARD_TILES if move.encodes else CHUNK_TILES
        reads += 0 if move.encodes else move.packs + move.n_bytes // _READ_BYTES
        writes += -(-move.tiles // tiles_a_pack) + _CELL_WRITES * mine.cells
    account.run_cost = reads / 1000 * cost.reads_1000 + writes / 1000 * cost.writes_1000


def _said_of_loss(move: MoveAccount, dry_run: bool) -> str:
    if move.largest_distortion is None:
        return ""
    if dry_run:
        over = move.max_distortion is not None and move.largest_distortion > move.max_distortion
        return f", loses {move.largest_distortion:.4g} of the variance of a sample" + (
            f": more than the {move.max_distortion:g} allowed, it would be refused" if over else ""
        )
    return f", lost {move.distortion:.4g} of the variance, of a cell at most {move.largest_distortion:.4g}"
