"""A shards folder that is about to be written: which files it will have, and how it is finished.

`presplit`, `reshard` and running jobs write the same folder, to the byte; they differ in where the bytes come from.
"""

from __future__ import annotations

from autotp_plan.schemas.plan.document import Plan
from autotp_plan.schemas.shards.file_layout import FileLayout
from autotp_plan.schemas.shards.manifest import MANIFEST_NAME, PLAN_NAME, Manifest, ShardFile, Source
from autotp_plan.schemas.shards.origin import Original
from autotp_plan.schemas.shards.output_folder import OutputFolder
from autotp_plan.schemas.shards.parts import balanced
from autotp_plan.schemas.storage import checksum


class NewShards:
    """The shards folder of a plan.

    Args:
        plan: the plan.
        original: what is not sharded of the checkpoint.
        max_file_bytes: a file has at most as many bytes of tensors, or one tensor.
    """

    def __init__(self, plan: Plan, original: Original, max_file_bytes: int) -> None:
        self.plan, self.original = plan, original
        self.layout = FileLayout(plan, original.unused, max_file_bytes)

    def sizes(self) -> dict[str, int]:
        """The bytes of every file but the plan and the manifest, by name."""
        sizes = {file.name: file.size for file in self.layout.files()}
        return sizes | {file.name: file.size for file in self.original.copied}

    def all_sizes(self) -> dict[str, int]:
        """As `sizes`, with -1 for the plan and the manifest, which are written last."""
        return {**self.sizes(), PLAN_NAME: -1, MANIFEST_NAME: -1}

    def shares(self, count: int) -> list[dict[str, int]]:
        """The files that each of `count` parts has, with their bytes: shares of about as many bytes.

        The small files of the checkpoint are of part 1.
        """
        files = list(self.layout.files())
        shares: list[dict[str, int]] = [{} for _ in range(count)]
        for file, number in zip(files, balanced([file.size for file in files], count)):
            shares[number][file.name] = file.size
        shares[0].update((file.name, file.size) for file in self.original.copied)
        return shares

    def finish(self, folder: OutputFolder, source: Source) -> Manifest:
        """Write plan and manifest into a folder whose other files are complete, and end its journal.

        Args:
            folder: the folder.
            source: the checkpoint that the tensors are those of.
        """
        folder.write_small(PLAN_NAME, self.plan.to_json().encode())
        manifest = self._manifest(folder, source)
        folder.sync()
        folder.write_small(MANIFEST_NAME, manifest.to_json().encode())
        folder.complete()
        return manifest

    def _manifest(self, folder: OutputFolder, source: Source) -> Manifest:
        owners = {file.name: file.owner for file in self.layout.files()}
        names = [*owners, *(file.name for file in self.original.copied), PLAN_NAME]
        files = [
            ShardFile(
                name=name,
                size=folder.finished[name].size,
                crc32=checksum.text(folder.finished[name].crc32),
                owner=owners.get(name),
            )
            for name in sorted(names)
        ]
        return Manifest(plan=self.plan.fingerprint, tp_size=self.plan.tp_size, files=tuple(files), source=source)
