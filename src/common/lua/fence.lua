-- held(stream, group, consumer, ids) -> {[stream id] = delivery count} of those ids that `consumer` holds now: the fence.
local function held(stream, group, consumer, ids)
  local function before(a, b)  -- numbers without leading zeros: the shorter one is the smaller one
    local dash, other = string.find(a, '-', 1, true), string.find(b, '-', 1, true)
    if dash ~= other then return dash < other end
    if #a == #b then return a < b end
    local ms, other_ms = string.sub(a, 1, dash), string.sub(b, 1, dash)
    if ms ~= other_ms then return ms < other_ms end
    return #a < #b
  end
  local low, high, owned = ids[1], ids[1], {}
  if not low then return owned end
  for i = 2, #ids do
    if before(ids[i], low) then low = ids[i] elseif before(high, ids[i]) then high = ids[i] end
  end
  for _, entry in ipairs(redis.call('XPENDING', stream, group, low, high, 1000000, consumer)) do
    owned[entry[1]] = tostring(entry[4])
  end
  return owned
end
