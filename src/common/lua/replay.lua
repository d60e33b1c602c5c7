#!lua
-- DEAD -> new: a dead letter enters the stream again with a fresh count of attempts. No allow-oom: refused when memory is full.
-- KEYS 1 stream 2 index 3 starts 4 tries 5 dlq 6 open 7.. processed sets
-- ARGV n x {dead-letter id, email_id, member, number of its set from 1, field in open}
-- -> n x (OK | NONE: no such dead letter | STALE: the mail lives or was done elsewhere, the letter is removed)
--#include stands
local answer = {}
for i = 1, #ARGV, 5 do
  local dead, email_id, open = ARGV[i], ARGV[i + 1], ARGV[i + 4]
  local entry = redis.call('XRANGE', KEYS[5], dead, dead)[1]
  local location = redis.call('HGET', KEYS[2], email_id)
  local here = location == 'D:' .. dead
  if not entry then
    answer[#answer + 1] = 'NONE'
  elseif location and not here and stands(KEYS[1], KEYS[5], location) then
    redis.call('XDEL', KEYS[5], dead)
    answer[#answer + 1] = 'STALE'
  elseif redis.call('SISMEMBER', KEYS[6 + tonumber(ARGV[i + 3])], ARGV[i + 2]) == 1 then
    redis.call('XDEL', KEYS[5], dead)
    if here then
      redis.call('HDEL', KEYS[2], email_id)
      if redis.call('HINCRBY', KEYS[6], open, -1) <= 0 then redis.call('HDEL', KEYS[6], open) end
    end
    answer[#answer + 1] = 'STALE'
  else
    local fields, copy, replays = entry[2], {}, 0
    for j = 1, #fields, 2 do
      if fields[j] == 'replays' then
        replays = tonumber(fields[j + 1]) or 0
      elseif string.sub(fields[j], 1, 5) ~= 'dead_' then
        copy[#copy + 1] = fields[j]
        copy[#copy + 1] = fields[j + 1]
      end
    end
    copy[#copy + 1] = 'replays'
    copy[#copy + 1] = string.format('%.0f', replays + 1)
    redis.call('HSET', KEYS[2], email_id, 'S:' .. redis.call('XADD', KEYS[1], '*', unpack(copy)))
    if not location then redis.call('HINCRBY', KEYS[6], open, 1) end   -- known to no index, so it was not counted
    redis.call('HDEL', KEYS[3], email_id)
    redis.call('HDEL', KEYS[4], email_id)
    redis.call('XDEL', KEYS[5], dead)
    answer[#answer + 1] = 'OK'
  end
end
return answer
