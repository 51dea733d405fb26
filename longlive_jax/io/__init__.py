"""Disks, checkpoint files of other libraries, and video files; the only place that is channel-first."""
