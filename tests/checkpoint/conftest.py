from hrm_megatron.parallel.cpu import activate

activate()

from hrm_megatron.checkpoint.iterations import folder_name  # noqa: E402
from hrm_megatron.checkpoint.manifest import describe_folder, write_manifest  # noqa: E402


def add_iteration(save, number, manifest=True):
    """Make an iteration of empty files, with the manifest that a save ends with or without."""
    folder = save / folder_name(number)
    folder.mkdir()
    for name in ("metadata.json", ".metadata", "common.pt"):
        (folder / name).write_text("{}")
    if manifest:
        write_manifest(folder, number, {}, describe_folder(folder))
