"""The machine: processor, memory, disk, pages."""
