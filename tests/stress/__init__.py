"""Load that shows what single runs do not: many containers at once, over and over."""
