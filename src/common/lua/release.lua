#!lua flags=allow-oom
-- Hand back what I hold and have not finished: claimable at once, its start not counted.
-- KEYS 1 stream 2 starts   ARGV 1 group 2 consumer, then n x {stream id, delivery count, email_id}   -> how many
--#include fence
local LONG_AGO = 86400000                         -- ms idle: more than any lease
local ids, mine = {}, {}
for i = 3, #ARGV, 3 do ids[#ids + 1] = ARGV[i] end
local owned = held(KEYS[1], ARGV[1], ARGV[2], ids)
for i = 3, #ARGV, 3 do
  local sid, count, email_id = ARGV[i], ARGV[i + 1], ARGV[i + 2]
  if owned[sid] == count then
    mine[#mine + 1] = sid
    local solo, last = string.match(redis.call('HGET', KEYS[2], email_id) or '', '^(%d+)|(.*)$')
    if last == sid .. ':' .. count then
      if solo == '0' then
        redis.call('HDEL', KEYS[2], email_id)
      else
        redis.call('HSET', KEYS[2], email_id, (tonumber(solo) - 1) .. '|')   -- still a suspect: its earlier start never finished
      end
    end
  end
end
local n = #mine
if n > 0 then
  mine[#mine + 1] = 'IDLE'
  mine[#mine + 1] = LONG_AGO
  mine[#mine + 1] = 'JUSTID'
  redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, unpack(mine))
end
return n
