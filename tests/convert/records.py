"""Records of conversions as older versions wrote them."""
import json
from pathlib import Path

from hrm_megatron.convert.ledger import EXPORT_FILE, OWN_DIGEST


def make_older(folder: Path, **changes: object) -> None:
    """Make the folder's record one without digests of settings and of itself, with these changes."""
    path = folder / EXPORT_FILE
    record = json.loads(path.read_text())
    for name in (OWN_DIGEST, "files"):
        record.pop(name, None)
    path.write_text(json.dumps(record | changes))
