-- stands(stream, dlq, location) -> whether there is an entry or a dead letter where the index says: it may have been deleted by hand.
local function stands(stream, dlq, location)
  local kind, id = string.sub(location, 1, 1), string.sub(location, 3)
  return #redis.call('XRANGE', kind == 'S' and stream or dlq, id, id) > 0
end
