"""The names of an archive as a tree in memory: which clash, and where symbolic links lead.

Covers what can be known without looking at the disk; ``writer`` keeps the disk in step with it. A target
folder starts empty and belongs to the process, so the tree is all there is in it.
"""

import attrs

from modelcache.archives.job import Job

_HOPS = 40  # symbolic links on the way to a file: Linux gives up there too


@attrs.define(eq=False)
class Node:
    """A folder, file or symbolic link.

    Attributes:
        parent: the folder it is in; None for the target folder.
        member: the name by which the archive calls it, for errors.
        folder: whether it is a folder.
        kids: what a folder holds.
        goal: where a symbolic link points, as the archive has it; None for anything else.
        charged: bytes of disk that were asked for on its account.
        names: bytes that the names in a folder take up.
    """

    parent: "Node | None"
    member: str = ""
    folder: bool = False
    kids: "dict[str, Node]" = attrs.field(factory=dict)
    goal: str | None = None
    charged: int = 0
    names: int = 0
    _final: "Node | None" = None

    def resolve(self, job: Job, hops: int = 1) -> "Node":
        """Return the file or folder that this link leads to, as the kernel would find it.

        Raises:
            UnsafeArtifact: it leads outside, be it through other links, or in a circle.
            ArtifactCorrupt: it leads to nothing.
        """
        if self._final is None:
            if hops > _HOPS:
                raise job.unsafe("a symbolic link in a circle, or over too many others", self.member)
            self._final = self._walk(job, hops)
        return self._final

    def _walk(self, job: Job, hops: int) -> "Node":
        here = self.parent or self
        for part in (self.goal or "").split("/"):
            if not here.folder:
                raise job.corrupt("a symbolic link to nothing: part of its goal is a file", self.member)
            if part in ("", "."):
                continue
            if part == "..":
                if here.parent is None:
                    raise job.unsafe("a symbolic link that leads outside", self.member)
                here = here.parent
            elif (kid := here.kids.get(part)) is None:
                raise job.corrupt("a symbolic link to nothing: its goal is not in the archive", self.member)
            else:
                here = kid if kid.goal is None else kid.resolve(job, hops + 1)
        return here
