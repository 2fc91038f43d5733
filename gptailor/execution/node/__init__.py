"""What a node has, and how workers share it: GPUs, cores, memory, disks."""
