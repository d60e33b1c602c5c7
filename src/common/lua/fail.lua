#!lua flags=allow-oom
-- fail, postpone, bury: a handler did not finish a mail; only for the owner.
-- KEYS 1 stream 2 index 3 starts 4 tries 5 due 6 dlq 7 open
-- ARGV 1 group 2 consumer 3 time (ISO),
--      then n x {stream id, delivery count, email_id, field in open, verb, delay in ms, reason, error type, error, traceback, handler}
--      verb: retry (counts an attempt) | crash (a retry of a mail whose process died: its start stays marked, so it is a suspect and
--            begins alone, and its suspicion grows) | postpone (counts none) | bury (counts one) | foreign (bury what is no mail of ours: no index)
-- -> n x {RETRY (also for crash) | POSTPONED | DEAD | GONE (deleted by hand; its index entry
--      stays, so that the audit sees it and the mail comes again) | ALREADY (this call repeated) | LOST, failed attempts}
--#include fence
--#include bury
local STEP, mails, ids = 11, {}, {}
local DEATH = 3                                   -- beside the start itself: see begin
for i = 4, #ARGV, STEP do
  local mail = {sid = ARGV[i], count = ARGV[i + 1], id = ARGV[i + 2], open = ARGV[i + 3], verb = ARGV[i + 4], delay = tonumber(ARGV[i + 5]),
                reason = ARGV[i + 6], error_type = ARGV[i + 7], error = ARGV[i + 8], traceback = ARGV[i + 9], handler = ARGV[i + 10]}
  mails[#mails + 1] = mail
  ids[#ids + 1] = mail.sid
end
local owned = held(KEYS[1], ARGV[1], ARGV[2], ids)
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local answer = {}
for i, mail in ipairs(mails) do
  local tries = redis.call('HGET', KEYS[4], mail.id)
  local attempts, last, first = string.match(tries or '0||', '^(%d+)|(%d*)|?(%d*)$')
  attempts = tonumber(attempts)
  if owned[mail.sid] ~= mail.count then
    answer[i] = {(owned[mail.sid] == 'settled ' .. mail.count or last == mail.count) and 'ALREADY' or 'LOST', attempts}
  else
    owned[mail.sid] = 'settled ' .. mail.count    -- the same delivery may come twice: see complete
    if mail.verb ~= 'postpone' then
      attempts = attempts + 1
      if first == '' then first = string.format('%.0f', now) end
    end
    local gone = #redis.call('XRANGE', KEYS[1], mail.sid, mail.sid) == 0
    if gone then
      answer[i] = {'GONE', attempts}
      redis.call('HDEL', KEYS[4], mail.id)
    elseif mail.verb == 'retry' or mail.verb == 'crash' or mail.verb == 'postpone' then
      answer[i] = {mail.verb == 'postpone' and 'POSTPONED' or 'RETRY', attempts}
      redis.call('HSET', KEYS[4], mail.id, attempts .. '|' .. mail.count .. '|' .. first)
      redis.call('ZADD', KEYS[5], string.format('%.0f', now + mail.delay), mail.sid .. '|' .. mail.id)
      if mail.verb == 'crash' then
        local suspicion, tag = string.match(redis.call('HGET', KEYS[3], mail.id) or '0|', '^(%d+)|(.*)$')
        redis.call('HSET', KEYS[3], mail.id, (tonumber(suspicion) + DEATH) .. '|' .. tag)
      end
    else
      answer[i] = {'DEAD', attempts}
      local notes = {'dead_reason', mail.reason, 'dead_error_type', mail.error_type, 'dead_error', mail.error, 'dead_traceback', mail.traceback,
                     'dead_attempts', tostring(attempts), 'dead_at', ARGV[3], 'dead_worker', ARGV[2], 'dead_handler', mail.handler}
      if mail.verb == 'foreign' then
        notes[#notes + 1] = 'dead_id'
        notes[#notes + 1] = mail.id
      end
      local dead = bury(KEYS[1], KEYS[6], mail.sid, notes, tries)
      if mail.verb ~= 'foreign' then redis.call('HSET', KEYS[2], mail.id, 'D:' .. dead) end
      redis.call('HDEL', KEYS[4], mail.id)
      redis.call('XDEL', KEYS[1], mail.sid)
    end
    if gone or mail.verb ~= 'crash' then redis.call('HDEL', KEYS[3], mail.id) end
    redis.call('XACK', KEYS[1], ARGV[1], mail.sid)
  end
end
return answer
