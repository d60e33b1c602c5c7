#!lua flags=allow-oom
-- An entry that no index knows becomes the mail that it is, as `begin` would do later: until then the producer takes the mail for unknown.
-- KEYS 1 stream 2 index 3 dlq 4 open 5.. processed sets
-- ARGV n x {stream id, email_id, member, number of its set from 1, field in open}
-- -> n x (OK | GONE: no such entry | KNOWN: another copy is the live one | DONE: done already; `begin` drops the entry)
--#include stands
local answer = {}
for i = 1, #ARGV, 5 do
  local here, email_id, open = 'S:' .. ARGV[i], ARGV[i + 1], ARGV[i + 4]
  local location = redis.call('HGET', KEYS[2], email_id)
  if not stands(KEYS[1], KEYS[3], here) then
    answer[#answer + 1] = 'GONE'
  elseif location and stands(KEYS[1], KEYS[3], location) then
    answer[#answer + 1] = 'KNOWN'
  elseif redis.call('SISMEMBER', KEYS[4 + tonumber(ARGV[i + 3])], ARGV[i + 2]) == 1 then
    answer[#answer + 1] = 'DONE'
  else
    redis.call('HSET', KEYS[2], email_id, here)
    if not location then redis.call('HINCRBY', KEYS[4], open, 1) end
    answer[#answer + 1] = 'OK'
  end
end
return answer
