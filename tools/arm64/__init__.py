"""The device, emulated: `python -m tools.arm64` runs its side on two boards' processors."""
