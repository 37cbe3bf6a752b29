"""What can be searched: operations, supernet, architecture, genotype, network, cost."""
