"""``python -m gradmatch.board README.md docs``: name the links of Markdown pages that lead nowhere."""

import sys

from gradmatch.board import broken_links

broken = broken_links(sys.argv[1:])
print("\n".join([f"broken link: {line}" for line in broken] or ["all links lead somewhere"]))
sys.exit(1 if broken else 0)
