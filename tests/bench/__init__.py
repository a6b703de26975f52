"""`make bench`: speed and memory as ratios against a peer, measured in one run."""
