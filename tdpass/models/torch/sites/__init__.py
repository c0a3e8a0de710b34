"""Which modules are sites, who reads their weights, and layers in their place."""
