"""What two hosts say to each other: messages, framed and authenticated, leases, and a connection that is asked."""
