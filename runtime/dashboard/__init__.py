"""A web page that shows a server's flights, and lets an operator hold them."""
