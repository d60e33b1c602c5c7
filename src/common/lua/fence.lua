-- held(stream, group, consumer, ids) -> {[stream id] = delivery count} of those ids that `consumer` holds now: the fence.
local function held(stream, group, consumer, ids)
  local function parts(id)
    local ms, seq = string.match(id, '^(%d+)-(%d+)$')
    return tonumber(ms), tonumber(seq)
  end
  local low, high, owned = ids[1], ids[1], {}
  if not low then return owned end
  local low_ms, low_seq = parts(low)
  local high_ms, high_seq = low_ms, low_seq
  for i = 2, #ids do
    local ms, seq = parts(ids[i])
    if ms < low_ms or (ms == low_ms and seq < low_seq) then low, low_ms, low_seq = ids[i], ms, seq end
    if ms > high_ms or (ms == high_ms and seq > high_seq) then high, high_ms, high_seq = ids[i], ms, seq end
  end
  for _, entry in ipairs(redis.call('XPENDING', stream, group, low, high, 1000000, consumer)) do
    owned[entry[1]] = tostring(entry[4])
  end
  return owned
end
