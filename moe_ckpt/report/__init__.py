"""Plans, results, findings and tables, as text for people and as documents for programs."""
