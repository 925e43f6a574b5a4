"""Information about the machine: processor, memory, disk, memory pages."""
