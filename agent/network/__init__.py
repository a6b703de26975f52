"""The guest's links, addresses, routes and neighbours, by rtnetlink."""
