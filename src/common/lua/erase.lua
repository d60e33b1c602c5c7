#!lua flags=allow-oom
-- Anywhere but in a worker's hands -> nothing: a mail is erased on somebody's request. Its processed id, a number, stays or is set, so
-- that nothing brings the mail back.
-- KEYS 1 stream 2 index 3 starts 4 tries 5 due 6 dlq 7 open 8 results 9 raw mail to remove 10 its steps 11 its processed set
--      12 13 copies of dlq and results that are being written 14.. runs of reprocess; a stream that something was deleted from is
--      noted beside the raw mail, to be rewritten, and its copy, which may hold the same, is dropped
-- ARGV 1 group 2 unfinished mail too: 1, else 0 3 seconds a processed id is kept 4 email_id 5 member of its set ('': its day is not known)
--      6 field in open ('': not known), then n and n ids of its entries, n and n of its letters, n and n of its results,
--      n and n references of its raw mail
-- -> {OK, and how many entries, letters, results, hashes of steps, mentions in runs went}
--    | {HELD: a worker has it} | {LIVE: unfinished, and not asked for} | {DANGLING: its entry or letter was deleted by hand, and nothing
--    tells the day of its processed id, so it would come back}: nothing was changed
--#include stands
--#include standing
local email_id, cursor, lists = ARGV[4], 7, {}
for i = 1, 4 do
  local n = tonumber(ARGV[cursor])
  lists[i] = {}
  for j = 1, n do lists[i][j] = ARGV[cursor + j] end
  cursor = cursor + n + 1
end
local entries, letters, results, refs = lists[1], lists[2], lists[3], lists[4]
local location = redis.call('HGET', KEYS[2], email_id)
if location then table.insert(string.sub(location, 1, 2) == 'S:' and entries or letters, string.sub(location, 3)) end

local live = false
for _, sid in ipairs(entries) do
  if pending(KEYS[1], ARGV[1], sid) then return {'HELD'} end
  live = live or stands(KEYS[1], KEYS[6], 'S:' .. sid)
end
if live and ARGV[2] ~= '1' then return {'LIVE'} end
if location and ARGV[5] == '' then return {'DANGLING'} end

local gone = {0, 0, 0, 0, 0}
for _, ref in ipairs(refs) do redis.call('SADD', KEYS[9], ref) end
if ARGV[5] ~= '' then
  redis.call('SADD', KEYS[11], ARGV[5])
  redis.call('EXPIRE', KEYS[11], ARGV[3])
end
for _, sid in ipairs(entries) do
  redis.call('ZREM', KEYS[5], sid .. '|' .. email_id)
  gone[1] = gone[1] + redis.call('XDEL', KEYS[1], sid)
end
for _, id in ipairs(letters) do gone[2] = gone[2] + redis.call('XDEL', KEYS[6], id) end
for _, id in ipairs(results) do gone[3] = gone[3] + redis.call('XDEL', KEYS[8], id) end
if gone[2] > 0 then
  redis.call('SADD', KEYS[9], KEYS[6])
  redis.call('DEL', KEYS[12])
end
if gone[3] > 0 then
  redis.call('SADD', KEYS[9], KEYS[8])
  redis.call('DEL', KEYS[13])
end
if location then
  for mark = 2, 4 do redis.call('HDEL', KEYS[mark], email_id) end
  if ARGV[6] ~= '' and redis.call('HINCRBY', KEYS[7], ARGV[6], -1) <= 0 then redis.call('HDEL', KEYS[7], ARGV[6]) end
end
gone[4] = redis.call('DEL', KEYS[10])
for i = 14, #KEYS do gone[5] = gone[5] + redis.call('SREM', KEYS[i], email_id) end
return {'OK', unpack(gone)}
