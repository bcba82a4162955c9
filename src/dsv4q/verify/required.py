"""Our own artifacts must pass the judge before we say that they are done."""

from __future__ import annotations

from pathlib import Path

from dsv4q.errors import VerificationFailed
from dsv4q.verify.judge import verify_headers
from dsv4q.verify.result import VerifyResult


def require_verified(out: Path) -> VerifyResult:
    """The independent judge looks at the headers before we say that it is done; what it says.

    Raises:
        VerificationFailed: it finds a difference.
    """
    result = verify_headers(out)
    if not result.ok:
        first = result.differences[0]
        raise VerificationFailed(
            f"The finished artifact has {len(result.differences)} difference(s) from the contract",
            where=f"{first.tensor or ''} {first.file or ''}".strip() or out,
            expected=first.expected,
            found=first.found,
            hint=f"dsv4q verify-shards {out} lists all; if it has only just been made, please report this",
        )
    return result
