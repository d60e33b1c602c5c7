#!lua flags=no-writes
-- Where each of these mails stands.
-- KEYS 1 stream 2 index 3 due 4 dlq 5.. processed sets   ARGV 1 group, then n x {email_id, member, number of its set from 1}
-- -> n x (done | unread | flight | waiting | lost: in the stream, but no worker would ever see it | dead |
--         dangling: the index names an entry or a letter that is gone, and nobody holds it | unknown)
--#include stands
--#include standing
local ids, of_set, answer = {}, {}, {}
for i = 2, #ARGV, 3 do
  local position, set = #ids + 1, tonumber(ARGV[i + 2])
  ids[position] = ARGV[i]
  of_set[set] = of_set[set] or {members = {}, positions = {}}
  table.insert(of_set[set].members, ARGV[i + 1])
  table.insert(of_set[set].positions, position)
end
if #ids == 0 then return answer end
local located = redis.call('HMGET', KEYS[2], unpack(ids))
local stand = standing(KEYS[1], ARGV[1], KEYS[3])
for i, email_id in ipairs(ids) do
  local kind, sid = string.sub(located[i] or '', 1, 1), string.sub(located[i] or '', 3)
  if not located[i] then
    answer[i] = 'unknown'
  elseif not stands(KEYS[1], KEYS[4], located[i]) then
    answer[i] = kind == 'S' and pending(KEYS[1], ARGV[1], sid) and 'flight' or 'dangling'
  else
    answer[i] = kind == 'D' and 'dead' or stand(sid, email_id)
  end
end
for set, part in pairs(of_set) do
  local done = redis.call('SMISMEMBER', KEYS[4 + set], unpack(part.members))
  for i = 1, #done do
    if done[i] == 1 then answer[part.positions[i]] = 'done' end
  end
end
return answer
