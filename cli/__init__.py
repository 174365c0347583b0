"""The command line: words only. Every command imports what it needs inside its body."""
