"""What the parts of the library promise each other, whoever wrote them."""
