"""OCI specs: read, checked, rewritten for the guest.

Enters: the JSON of config.json, of an exec or of an update.
Leaves: Kata's messages and plain values. Nothing is made or changed; of files config.json is read, and of the
host its table of devices.
May import: state.
"""
