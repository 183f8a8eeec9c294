"""Tables and figures of the papers, with the networks and data they need."""
