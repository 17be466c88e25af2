"""The commands' work, free of terminals: each stage takes data and a progress callback."""
