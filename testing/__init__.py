"""What the demo, the end-to-end tests and the bench share: a containerd of their own, local images,
containerd's API, and a count of what a run leaves behind. Not installed with the shim.
"""
