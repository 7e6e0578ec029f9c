"""The built-in methods: one published method per file. They reach the core through the registry's entry points."""
