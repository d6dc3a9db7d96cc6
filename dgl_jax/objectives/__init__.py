"""What modules minimise."""
