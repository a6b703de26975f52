"""OCI specs: read, checked, rewritten for the guest.

Enters: the JSON of config.json, of an exec or of an update.
Leaves: Kata's messages and plain values. Nothing is opened, made or asked.
May import: none of its siblings.
"""
