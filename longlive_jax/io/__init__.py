"""Disks: checkpoints, files of other libraries, videos; the only channel-first place."""
