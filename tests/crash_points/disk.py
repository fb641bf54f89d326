"""A run folder as a program sees it, and what a power cut would leave of it."""

import os
import shutil
from pathlib import Path

LARGE = 1 << 16  # bytes; larger files are read again only if their time or size has changed
Tree = dict[str, bytes | None]
"""What each file holds, by its path in the run folder; None for a folder."""


class Disk:
    """Follows a run folder; POSIX promises a file's content and a folder's names only after their fsync."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._files: dict[int, bytes] = {}  # by inode, as the others
        self._folders: dict[int, dict[str, int]] = {}
        self._synced_files: dict[int, bytes] = {}
        self._synced_folders: dict[int, dict[str, int]] = {}
        self._seen: dict[int, tuple[int, int]] = {}
        self._held: list[int] = []  # descriptors, so that no inode is used again

    def look(self, *, synced: bool = False) -> None:
        """Note what is there now; `synced`: and that it is on the disk."""
        if self.root.exists():
            self._look(self.root)
        if synced:
            self._synced_files.update(self._files)
            self._synced_folders.update(self._folders)

    def _look(self, path: Path) -> int:
        status = path.stat()
        inode, now = status.st_ino, (status.st_size, status.st_mtime_ns)
        if inode not in self._seen:
            self._held.append(os.open(path, os.O_PATH))
        if path.is_dir():
            self._folders[inode] = {entry.name: self._look(entry) for entry in sorted(path.iterdir())}
        elif now != self._seen.get(inode) or status.st_size < LARGE:
            self._files[inode] = path.read_bytes()
        self._seen[inode] = now
        return inode

    def sync(self, path: Path) -> None:
        """Note that a file's content, or a folder's names, are on the disk."""
        inode = path.stat().st_ino
        if inode in self._folders:
            self._synced_folders[inode] = self._folders[inode]
        else:
            self._synced_files[inode] = self._files[inode]

    def tree(self, *, bytes_lost: bool = False, names_lost: bool = False) -> Tree:
        """What is there; without what was not synced, as far as that is lost. Empty if there is no folder."""
        folders = self._synced_folders if names_lost else self._folders
        files = self._synced_files if bytes_lost else self._files
        found: Tree = {}

        def collect(path: str, inode: int) -> None:
            found[path] = None if inode in self._folders else files.get(inode, b"")
            names = folders.get(inode, {})
            if path == ".":  # nothing syncs the run folder itself: its folders are taken to have got there
                names = {**{n: i for n, i in self._folders[inode].items() if i in self._folders}, **names}
            for name, below in names.items():
                collect(f"{path}/{name}".removeprefix("./"), below)

        if self.root.exists():
            collect(".", self.root.stat().st_ino)
        return found

    def close(self) -> None:
        for descriptor in self._held:
            os.close(descriptor)


def read_tree(root: Path) -> Tree:
    """What a folder holds."""
    disk = Disk(root)
    disk.look()
    disk.close()
    return disk.tree()


def write_tree(root: Path, tree: Tree) -> None:
    """Make a folder hold this and nothing else."""
    shutil.rmtree(root, ignore_errors=True)
    for path, content in tree.items():
        (root / path).mkdir() if content is None else (root / path).write_bytes(content)


def half_written(path: str, before: Tree, after: Tree) -> Tree:
    """After half of a write, or of a file that was made longer and is being filled."""
    old, new = before.get(path) or b"", after.get(path) or b""
    half = (len(old) + len(new)) // 2 if new.startswith(old) else len(new) // 2
    return {**after, path: new[:half] + bytes(0 if new.startswith(old) else len(new) - half)}
