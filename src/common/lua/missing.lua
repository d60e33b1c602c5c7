#!lua flags=no-writes
-- Which of these mails are known nowhere: neither unfinished nor dead nor done.
-- KEYS 1 index 2.. processed sets   ARGV n x {email_id, member, number of its set from 1}   -> positions from 1
local located, of_set, ids, unknown = nil, {}, {}, {}
for i = 1, #ARGV, 3 do
  local position, set = #ids + 1, tonumber(ARGV[i + 2])
  ids[position] = ARGV[i]
  of_set[set] = of_set[set] or {members = {}, positions = {}}
  table.insert(of_set[set].members, ARGV[i + 1])
  table.insert(of_set[set].positions, position)
end
if #ids == 0 then return unknown end
located = redis.call('HMGET', KEYS[1], unpack(ids))
for set, part in pairs(of_set) do
  local done = redis.call('SMISMEMBER', KEYS[1 + set], unpack(part.members))
  for i = 1, #done do
    local position = part.positions[i]
    if done[i] == 0 and not located[position] then unknown[#unknown + 1] = position end
  end
end
table.sort(unknown)
return unknown
