"""Storages of Kata's agent protocol: mounts, disks, copied files, and how full they are."""
