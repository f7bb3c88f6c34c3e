"""Turns the bytes of one file from a source into a file or a folder on disk, safely.

Covers: telling archives from single files, decoding, unpacking tar and zip, limits, and the checks that
keep every member inside its folder. Does not cover: fetching and verifying bytes (``sources``), making
room, syncing, publishing and deleting (``disk``), and what an artifact means (the user's ``load``).

**What is unpacked.** A name that ends in one of ``sources.base.ARCHIVE_SUFFIXES``, or that has no suffix
at all, is looked at by content: a ``.tar.gz`` that is really a zip is unpacked as the zip it is. Any other
suffix (``.joblib``, ``.pt``, ``.npz``) is one file, kept as it is.

**Bytes after the end.** One rule for tar, tar.gz, tar.zst and zip: after the end of the archive, and after
the end of its compressed data, zero bytes are padding and accepted; anything else is ``ArtifactCorrupt``.
A further gzip member or zstd frame is no trailing byte: it continues the data, padding between or not.

**What stays of a member.** Its path (a leading ``./`` is dropped, a wrapper folder kept), its bytes, whether
its owner may execute it, and links that stay inside. Owner, times, other mode bits and extended attributes
are not taken over. ``._*`` files and inner archives are files like others.
"""

from modelcache.archives.decode import Readable
from modelcache.archives.job import Job, Limits
from modelcache.archives.unpacking import unpack
from modelcache.archives.writer import Writer

__all__ = ["Job", "Limits", "Readable", "Writer", "unpack"]
