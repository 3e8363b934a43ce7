"""Compares methods: tasks x starting learning rates x seeds, scored against a sweep of linear decays."""
