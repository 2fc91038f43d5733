"""How workers share a node's GPUs, cores, memory and disks."""
