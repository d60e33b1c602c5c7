-- bury(stream, dlq, id, notes) -> id of the dead letter, or nil where the entry is gone. Copies the entry's fields, less any
-- dead_*, and adds the notes. At most 1,000 pairs are copied: a foreign entry may hold more than `unpack` can pass on.
local function bury(stream, dlq, id, notes)
  local entry = redis.call('XRANGE', stream, id, id)[1]
  if not entry then return nil end
  local fields, copy = entry[2], {}
  for i = 1, math.min(#fields, 2000), 2 do
    if string.sub(fields[i], 1, 5) ~= 'dead_' then
      copy[#copy + 1] = fields[i]
      copy[#copy + 1] = fields[i + 1]
    end
  end
  for i = 1, #notes do copy[#copy + 1] = notes[i] end
  return redis.call('XADD', dlq, '*', unpack(copy))
end
