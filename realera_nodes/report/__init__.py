"""Before and after: probes, pictures, numbers and the report that shows them."""
