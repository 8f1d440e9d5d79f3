"""What a node does with a request: objects, transforms, access, and the assembly of its parts."""
